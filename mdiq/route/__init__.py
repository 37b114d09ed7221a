"""One address for several rings and copies: which server a request goes to, and what becomes of it when that dies."""
