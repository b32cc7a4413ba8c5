//! Every test that uses the library as a program would, in one binary.

mod cancel;
mod locks;
