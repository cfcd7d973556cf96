"""Language models: tokens, layouts, log-probabilities, sampling and the loop of the language trainers."""
