"""What ring a topology or flags mean, what is planned, and how services are wired. Flags and tables are cli/'s."""
