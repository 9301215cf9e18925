"""Evidence from judges: likelihoods made of the scores of process reward models."""
