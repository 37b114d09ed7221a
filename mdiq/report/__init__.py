"""For the person who decides: trials of a ring, the paper's evaluation, and the pages that show them."""
