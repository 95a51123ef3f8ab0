"""Models of others taken apart: decoders and towers of Hugging Face, SB3 zips, LeRobot processors; tiny ones."""
