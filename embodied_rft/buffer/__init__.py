"""Where experience rests: schema, columns, ring, images, reading, plans, files."""
