"""Classification of whole series: the UEA sets and users' own files."""
