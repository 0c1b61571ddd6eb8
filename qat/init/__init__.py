"""What happens before the first step: calibration, where scales begin, and what may be done to the weights."""
