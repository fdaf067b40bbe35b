"""Figures of the signADAM++ paper (Wang et al., arXiv 1907.09008) and loss landscapes: `python -m launch.figures`."""
