"""What a model scores, by where its G_LM comes from."""
