"""What is measured: intervals, diversity, KL, over-optimisation, figures and the report."""
