"""The doctor: networks that already have a reversal, examined by measurement, diagnosed and adopted."""
