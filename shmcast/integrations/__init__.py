"""Under the engines: each integration patches one engine, at run time, and takes it back."""
