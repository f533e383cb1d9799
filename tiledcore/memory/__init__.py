"""Memory: predicted by simulated execution, planned for a budget."""
