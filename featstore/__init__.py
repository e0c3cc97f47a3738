"""featstore: run a frozen vision backbone once, keep its activations, train heads from them."""
