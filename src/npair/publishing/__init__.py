"""From a checkpoint to a version folder."""
