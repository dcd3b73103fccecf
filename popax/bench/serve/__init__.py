"""`popax bench serve`: many users behind one engine, under load."""
