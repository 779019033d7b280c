"""The REST service: reads and writes SQL through the store, sends chunks through the broker, and knows no engine."""
