"""Functions Module -> Module that lower the precision of weights. Calibration and reports included."""
