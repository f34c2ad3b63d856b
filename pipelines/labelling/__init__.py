"""Label maps of a converted data set (`pss-convert DIR --token-labels`): what a teacher finds at every place of its
images, kept beside them. The teacher itself is of `pss.inference.labelling`; here nothing is known of models.
"""
