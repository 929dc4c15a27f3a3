"""FP8 prefill on sm_90, written in Gluon."""
