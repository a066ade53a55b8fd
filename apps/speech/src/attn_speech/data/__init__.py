"""Speech, mixtures and rooms: from files to batches."""
