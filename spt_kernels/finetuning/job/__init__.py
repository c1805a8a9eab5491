"""What is asked for: a job, its recipe, the presets that were published, a plan that is given."""
