"""Other libraries' data and models, and ours in theirs. Each module needs its library, which is an optional extra."""
