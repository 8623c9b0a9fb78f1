"""What a person looks at. Facts are drawn here, never computed."""
