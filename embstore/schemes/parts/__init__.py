"""What scheme files are built from: tables and learners of one scheme, and helpers that several share."""
