"""What comes in is checked here: bounds, one validation of records, JSON without NaN."""
