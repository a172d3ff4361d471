"""What was learned: tables and pictures made from a run's files."""
