"""quantport quantizes BF16/FP16 models while they load, on whatever accelerator it finds."""
