"""From a checkpoint to files that edge-run can run. Importing does nothing."""
