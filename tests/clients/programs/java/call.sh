cp form Gateway.java
javac Gateway.java Call.java
java -cp . Call "$@"
