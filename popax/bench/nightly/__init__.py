"""`popax train` as a nightly job: who is trained, what a chain of nights is worth, what a night without news costs."""
