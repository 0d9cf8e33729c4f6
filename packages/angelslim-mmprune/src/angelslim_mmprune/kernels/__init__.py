"""Operations with a reference and faster implementations."""
