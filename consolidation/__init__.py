"""Sleep: what the model does with what it kept while no tokens come in."""
