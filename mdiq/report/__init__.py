"""What a person who decides reads: trial, evaluation, what a ring of other devices would do, privacy."""
