"""Labels of System 1 and 2: from voters or known, how they are decided, calibrated and reported."""
