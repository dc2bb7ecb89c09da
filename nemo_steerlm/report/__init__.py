"""What is shown: tables for a terminal, pictures, pages. All figures come from the rooms below."""
