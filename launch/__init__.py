"""What torchrun starts: training runs, the demo, and the tasks and data they use."""
