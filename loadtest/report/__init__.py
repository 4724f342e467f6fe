"""Results for people: tables on a terminal, an HTML page, files."""
