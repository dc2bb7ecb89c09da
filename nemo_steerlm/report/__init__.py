"""Tables for a terminal, pictures and pages. All figures come from other folders."""
