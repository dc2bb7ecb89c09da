"""Raw data to conversations, and conversations to tokens."""
