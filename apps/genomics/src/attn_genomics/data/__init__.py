"""Reading sequences, places and variants."""
