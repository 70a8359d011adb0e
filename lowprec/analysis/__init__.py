"""What runs and formats look like to people: tables and plots."""
