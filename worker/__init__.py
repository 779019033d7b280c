"""The worker: a Celery process that holds one engine and answers chunks of many batches at once."""
