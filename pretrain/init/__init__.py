"""New projects: a folder of one's own with the configurations and job scripts that this installation holds."""
