"""The task of classifying bags of instances, such as slides whose patches are encoded (multiple-instance learning)."""
