"""Runs plans of tokens through a language model. Knows neither Celery nor SQL nor HTTP; needs torch only where it computes."""
