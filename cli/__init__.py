"""The two commands, `featstore` and `heads`: parse, call one library function, print."""
