"""Tables, files and pictures of finished studies."""
