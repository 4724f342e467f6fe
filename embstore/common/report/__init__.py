"""Reports as one HTML file each: templates and macros, a style sheet, plots as inline SVG. Needs no torch."""
