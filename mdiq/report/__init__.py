"""What a person who decides reads: the trial, the evaluation, what a ring of other devices would do, privacy."""
