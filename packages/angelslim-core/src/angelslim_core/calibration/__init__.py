"""What calibrated passes see: data as token ids, chat templates rendered in a bounded child, streaming statistics."""
