"""Medical segmentation with attention, in 2-D and 3-D, scored as clinicians' challenges score."""
