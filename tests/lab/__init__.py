"""What several tests share: toys, models of the buffer, environments that misbehave, how learning tests run."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
